"""Attacks on a model that should refuse: does safety survive more than a plain request?"""
