"""`octavo doctor`: checks whether training works on this machine, in float8, with a given config.

It checks the machine and tries each GEMM backend once. Given a config, it repeats what training does before
its first step: it validates the config, opens the tokenizer, builds the model on the meta device, checks the
free disk space, and compares the estimated memory with the machine's. It leaves no files behind. A broken
Python or torch must not end it: whatever fails becomes a finding.
"""
