"""A model of the training step: what each layer computes, moves and keeps, and the least time that takes on a GPU."""
