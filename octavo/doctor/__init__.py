"""`octavo doctor`: will training work here, in float8, with this config? A verdict and the next command.

It looks at the machine, tries each way of multiplying float8 once, and, given a config, takes the steps that
training would take before its first one: judge the config, open the tokenizer, build the model without
memory, look for room on the disk; and holds the estimated memory against the machine's. Nothing stays
written. Python's and torch's own defects must not end it, so whatever is broken becomes a finding.
"""
