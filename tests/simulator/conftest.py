from hypothesis import settings

# Examples are limited by number, not by time: a busy machine must not fail a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
