"""Preloaded by workers of the tests: their machine seems to have two GPUs, seen in this order."""

import os

from stages.common import devices

devices.uuids = lambda: os.environ["SEEN"].split(",")
