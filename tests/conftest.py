"""What every test shares."""

from hypothesis import HealthCheck, settings

# On a busy machine the time of one example says nothing.
settings.register_profile("megarl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megarl")
