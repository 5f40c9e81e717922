"""The report on a precision map: one HTML file, and the layers and colours that it shares with the terminal."""

from foveate.report.page import Measured as Measured
from foveate.report.page import html as html
