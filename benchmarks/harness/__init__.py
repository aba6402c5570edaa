"""What all GPU benchmarks share: the command line, the rounds, the conditions they ran under, and the report.

options.py     --smoke, --minutes, --rounds, --out, --predict
machine.py     what it ran on: device, versions, commit, and clocks, power and temperature while it ran
comparison.py  the sides of a comparison, timed in turn, with a control that is one side twice
report.py      JSON, a table, a plot
gradients.py   how precise they are
makers.py      kernels that do more than cast, for cast_bandwidth.py
sizes.py       the layers that are run
goals.py       what the benchmarks should show
first_gpu_report.py  first_gpu.py's table, and the pages that show it
"""
