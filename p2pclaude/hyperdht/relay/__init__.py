"""Blind relays: where two peers meet whom NATs keep apart; both sides of it, and the channels they speak through."""
