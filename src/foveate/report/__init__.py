"""The report on a map: one HTML file, and the layers and colours that the terminal shares with it."""

from foveate.report.page import Measured as Measured
from foveate.report.page import html as html
