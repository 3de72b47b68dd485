"""The paper's tables in miniature: small real models, enough training in every arm, and a domain that no arm has seen.

`make study` trains what has no result yet, and `make study TABLE=a6` one table. README.md is the report.
"""
