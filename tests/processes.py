"""Runs programs in processes of their own, on a machine that may be busy."""

import subprocess
import tempfile
import time


def outputs(commands, **options):
    """Runs the commands side by side; returns what each of them printed.

    There is no time limit, because a busy machine is slow. Where one fails, the others are stopped:
    they would wait for it, and run on beside the next test.
    """
    files = [tempfile.TemporaryFile("w+") for _ in commands]  # noqa: SIM115  (closed below)
    started = [
        subprocess.Popen(command, text=True, stdout=file, stderr=subprocess.STDOUT, **options)
        for command, file in zip(commands, files, strict=True)
    ]
    try:
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started):
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = []
    for file in files:
        with file:
            file.seek(0)
            said.append(file.read())
    codes = [process.returncode for process in started]
    assert not any(codes), f"exit codes {codes}:\n" + "\n".join(said)
    return said
