"""How the cost of large data sets grows: embedding, and reading for stage 2, from 100,000 to 10 million captions."""
