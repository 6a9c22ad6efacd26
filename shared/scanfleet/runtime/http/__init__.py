"""HTTP of all services: `scanfleet.runtime.service` joins these parts to an application."""
