"""The axes of a mesh of devices, as --mesh names them."""

from experiments.launch.errors import FlagError

AXES = ('data', 'classes')


def mesh_sizes(mesh: str) -> dict[str, int]:
    """Parses the names and sizes of the axes of a mesh, such as 'data=2,classes=4'."""
    sizes = {}
    for axis in mesh.split(','):
        name, _, size = axis.partition('=')
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise FlagError(
                f'--mesh must have one or both of the axes {" and ".join(AXES)} with their sizes, such as '
                f'data=2,classes=4; got {mesh}'
            )
        sizes[name] = int(size)
    return sizes
