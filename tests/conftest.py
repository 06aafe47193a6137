"""Settings of all tests."""

from hypothesis import settings

# A busy machine makes single examples slow; what is tested is not their speed.
settings.register_profile("fedexp", deadline=None)
settings.load_profile("fedexp")
