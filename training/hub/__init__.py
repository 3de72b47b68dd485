"""Hub: conversion of the original checkpoints."""
