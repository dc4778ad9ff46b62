"""Which device each worker has, what that takes of its memory, and what follows from it."""
