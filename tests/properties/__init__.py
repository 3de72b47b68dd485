"""Properties that hold for every input, on inputs that hypothesis makes."""
