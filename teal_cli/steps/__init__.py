"""The steps of the chain, one module each: a configuration in, a result out."""
