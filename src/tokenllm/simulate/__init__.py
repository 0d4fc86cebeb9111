"""A server without a GPU: the router's own code against a clock that a cost model moves."""
