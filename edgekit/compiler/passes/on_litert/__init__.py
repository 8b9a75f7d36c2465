"""Passes that make ``.tflite`` models: conversion from torch, full-integer quantization."""
