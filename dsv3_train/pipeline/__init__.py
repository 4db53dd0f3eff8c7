"""Pipeline schedules as data: one definition that is checked, simulated, drawn and executed."""
