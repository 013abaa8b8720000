"""Checks: functions from a History to findings, each with its threshold and the reason for it."""
