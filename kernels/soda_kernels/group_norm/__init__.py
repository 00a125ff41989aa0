"""Group norm with a stack of modulations, activation, residual sum and dropout in one op."""
