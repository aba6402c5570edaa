"""`python -m octavo.launch`: what ./run_train.sh calls."""

from octavo.core.exit_codes import leave
from octavo.core.terminal import show_uncaught_safely
from octavo.launch.launcher import main

show_uncaught_safely()
leave(main())
