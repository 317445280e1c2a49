"""Floor 4: the methods. passes/prune/wanda.py is prune.wanda; listing the folder lists the methods."""
