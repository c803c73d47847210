"""What tools/aot.py compiles: each module has a list `CASES` of AotCase."""
