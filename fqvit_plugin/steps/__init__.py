"""Steps of a recipe beyond ranges: what calibration images alone can still improve."""
