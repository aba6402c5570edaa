"""Every test here has a working directory of its own."""

from tests.config.conftest import working_directory as working_directory
