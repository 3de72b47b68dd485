"""What is in a captioned data set or benchmark, and what is wrong with it (`llm2clip check-data`)."""
