"""What the engine and the service cost on this machine, beside rival stacks. `make bench`; no test.

    __main__.py   the command line
    sheet.py      figures, ratios and goals; the report
    workload.py   posts, jobs and a service in a home folder of its own
    rivals.py     the same work done by transformers, TRL and llama.cpp, each in a process of its own
    training.py   rows on training
    answering.py  rows on inference and latency
    growth.py     rows on cost as work grows, each with a plot
    preparing.py  rows on checking training files and counting tokens
"""
