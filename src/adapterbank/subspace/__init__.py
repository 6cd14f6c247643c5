"""Pure tensor maths: low-rank updates, shared bases, projection, choice of ``k``, diagnosis. No names, no files."""
