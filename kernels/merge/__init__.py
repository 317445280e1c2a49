"""Many models into one, number by number: what a merge computes, in C and with the rounding of numpy."""
