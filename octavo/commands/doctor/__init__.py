"""`octavo doctor`: checks whether this machine and, given a config, a job are ready for float8 training.

It checks the machine and tries each GEMM backend once. Given a config, it repeats what training does before
its first step: it validates the config, opens the tokenizer, builds the model on the meta device, checks the
free disk space, and compares the estimated memory with the machine's. It leaves no files behind. It must
survive a broken Python or torch: every failure becomes a finding.
"""
