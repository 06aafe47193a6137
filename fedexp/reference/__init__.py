"""What a Gin file can name: every configurable, for terminals and as pages."""

from fedexp.reference.pages import write as write
