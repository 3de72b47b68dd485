"""`llm2clip verify`: are the files in a folder those that llm2clip wrote?"""
