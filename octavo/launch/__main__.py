"""`python -m octavo.launch`: what ./run_train.sh calls."""

from octavo.core.exit_codes import leave
from octavo.launch.launcher import main

leave(main())
