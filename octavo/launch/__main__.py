"""`python -m octavo.launch`: what ./run_train.sh calls."""

from octavo.core.exit_codes import leave
from octavo.core.streams import open_closed_streams
from octavo.core.terminal import show_uncaught_safely
from octavo.launch.launcher import main

open_closed_streams()
show_uncaught_safely()
leave(main())
