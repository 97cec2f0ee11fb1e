"""`python -m paracompile tune`: what each setting of the first block cache costs a pipeline's pictures, and saves."""
