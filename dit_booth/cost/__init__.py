"""Costs: FLOPs, parameters, and descriptions of models and strategies, counted without computing anything."""
