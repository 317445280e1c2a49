"""Parts of stages that write weights in another form."""
