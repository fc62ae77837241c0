// This file exists because a precompiled header needs a target with a source file.
