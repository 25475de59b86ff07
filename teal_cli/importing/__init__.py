"""Reading what other implementations of the method measured."""
