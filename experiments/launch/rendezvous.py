"""Meeting at a port: who is missing, comes twice or counts others is told so in a line.

JAX's own start would end such a process by a C++ abort. So the processes meet here first, and JAX takes the port over.
"""

import socket
import time

GO = 'go'


class JoinError(Exception):
    """Why the processes of a run have not come together, in a line."""


def meet(host: str, port: int, count: int, index: int, patience: float) -> None:
    """Returns when all `count` processes have come to the port of process 0; JoinError after `patience` seconds."""
    deadline = time.monotonic() + patience
    if index == 0:
        _receive(port, count, deadline, patience)
    else:
        _come(host, port, f'{index} of {count}', deadline, patience)


def _receive(port: int, count: int, deadline: float, patience: float) -> None:
    try:
        server = socket.create_server(('', port))
    except OSError as error:
        raise JoinError(f'--coordinator: process 0 cannot listen at port {port}: {error.strerror}') from error
    present: dict[int, socket.socket] = {}
    with server:
        try:
            while missing := [index for index in range(1, count) if index not in present]:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    guest, _ = server.accept()
                    guest.settimeout(5)
                    said = _read(guest)
                except OSError:  # nobody has come, or one who has gone again
                    if time.monotonic() < deadline:
                        continue
                    shown = ', '.join(map(str, missing[:8])) + (', ...' if len(missing) > 8 else '')
                    late = f'these have not come within {patience:g} seconds: {shown}'
                    message = f'--num-processes: of {count} processes {late}'
                    for guest in present.values():
                        _answer(guest, message)
                    raise JoinError(message) from None
                index, _, number = said.partition(' of ')
                if not index.isdecimal():
                    _answer(guest, '')
                elif number != str(count):
                    _answer(guest, f'--num-processes is {number} here and {count} in process 0')
                elif int(index) in present:
                    _answer(guest, f'--process-id: there is a process {index} already')
                else:
                    present[int(index)] = guest
            for guest in present.values():
                _answer(guest, GO)
        finally:
            for guest in present.values():
                guest.close()


def _come(host: str, port: int, name: str, deadline: float, patience: float) -> None:
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as server:
                server.sendall(f'{name}\n'.encode())
                server.settimeout(max(1, deadline - time.monotonic()) + 5)
                answer = _read(server)
        except OSError as error:
            if time.monotonic() > deadline:
                raise JoinError(
                    f'--coordinator: no process 0 answered at {host}:{port} within {patience:g} seconds '
                    f'({error.strerror or error})'
                ) from error
            time.sleep(0.2)
            continue
        if answer != GO:
            told = (
                answer if answer.startswith('--') else f'--coordinator: no process 0 is at {host}:{port}, but another'
            )
            raise JoinError(told)
        return


def _read(connection: socket.socket) -> str:
    """A line, or what there is of it."""
    line = b''
    while not line.endswith(b'\n') and len(line) < 1000 and (part := connection.recv(1000)):
        line += part
    return line.decode(errors='replace').strip()


def _answer(guest: socket.socket, message: str) -> None:
    with guest:
        try:
            guest.sendall(f'{message}\n'.encode())
            guest.recv(1)  # until the guest has closed: who closes first keeps the port busy
        except OSError:
            pass  # it has gone, which the watch over the processes will notice
