"""`arm`: the inverse dynamics of a simulated 7-joint arm, in the shape of SARCOS, with no download.

Inputs are 7 joint angles (rad), velocities (rad/s) and accelerations (rad/s^2), targets the 7 joint
torques (N m) that produce them, computed by the recursive Newton-Euler algorithm (Craig,
'Introduction to Robotics', section 6.5) for rigid links without friction.

The arm is that of a standing person: the shoulder's first axis points sideways, so that gravity
loads every joint. Three axes meet in the shoulder, one lies in the elbow, three make the wrist.
"""

from typing import NamedTuple

import numpy as np

from ...rng import stream
from .base import Dataset, columns_of, standardised

Array = np.ndarray

JOINTS = 7
GRAVITY = np.array([-9.81, 0.0, 0.0])  # m/s^2 in the frame of the base, whose x points up
DENSITY = 1000.0  # kg/m^3, of the links

MOVEMENTS = {"train": 80, "val": 20, "test": 20}
MOMENTS, INTERVAL = 100, 0.1  # examples taken from a movement, and the seconds between two
SINES, FREQUENCIES = 4, (0.1, 0.8)  # of a movement; Hz


class Link(NamedTuple):
    """A joint and the link that it moves; the link's body is a solid cylinder.

    The link's frame comes out of the frame before by a turn about x by `alpha`, then about z by the
    joint's angle, then a shift along z by `d` (modified Denavit-Hartenberg with a = 0). Its z is
    the joint's axis.

    alpha : rad. d : m. low, high : limits of the joint's angle, rad.
    start, end : the ends of the cylinder's axis in the link's frame, m. radius : m.
    """

    alpha: float
    d: float
    low: float
    high: float
    start: tuple[float, float, float]
    end: tuple[float, float, float]
    radius: float

    def offset(self) -> Array:
        """Return the origin of this frame in the frame before: (3,), m."""
        return self.d * np.array([0.0, -np.sin(self.alpha), np.cos(self.alpha)])

    def rotation(self, angle: Array) -> Array:
        """Return R, which takes vectors from this frame to the one before: (n,) -> (n, 3, 3)."""
        R = np.zeros((*angle.shape, 3, 3), angle.dtype)
        R[..., 0, 0], R[..., 0, 1] = np.cos(angle), -np.sin(angle)
        R[..., 1, 0], R[..., 1, 1] = np.sin(angle), np.cos(angle)
        R[..., 2, 2] = 1
        cos, sin = np.cos(self.alpha), np.sin(self.alpha)
        return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ R

    def body(self) -> tuple[float, Array, Array]:
        """Return mass (kg), centre of mass (3,) and inertia about it (3, 3) in the link's frame."""
        axis = np.subtract(self.end, self.start)
        length = float(np.linalg.norm(axis))
        mass = DENSITY * np.pi * self.radius**2 * length
        along = mass * self.radius**2 / 2
        across = mass * (3 * self.radius**2 + length**2) / 12
        projector = np.outer(axis, axis) / length**2
        inertia = along * projector + across * (np.eye(3) - projector)
        return mass, np.add(self.start, self.end) / 2, inertia


QUARTER = np.pi / 2
UPPER_ARM, FOREARM, HAND = 0.30, 0.26, 0.18  # lengths, m
ARM = (
    # Shoulder: swing forward, lift sideways (at -QUARTER the arm hangs), turn about the upper arm.
    # The upper arm and the forearm consist of halves that turn against each other.
    Link(0.0, 0.0, -1.0, 1.5, (0, 0, -0.10), (0, 0, 0.05), 0.060),
    Link(-QUARTER, 0.0, -2.0, -0.6, (0, 0, 0), (0, -UPPER_ARM / 2, 0), 0.050),
    Link(QUARTER, UPPER_ARM, -1.2, 1.2, (0, 0, -UPPER_ARM / 2), (0, 0, 0), 0.045),
    # Elbow: bend, and turn about the forearm.
    Link(QUARTER, 0.0, 0.1, 2.2, (0, 0, 0), (0, FOREARM / 2, 0), 0.040),
    Link(-QUARTER, FOREARM, -1.2, 1.2, (0, 0, -FOREARM / 2), (0, 0, 0), 0.035),
    # Wrist: bend, and turn about the hand.
    Link(-QUARTER, 0.0, -0.8, 0.8, (0, 0, 0), (0, -HAND / 2, 0), 0.030),
    Link(QUARTER, 0.0, -0.8, 0.8, (0, 0, HAND / 2), (0.06, 0, HAND), 0.030),  # holds it bent
)


def load(seed: int, target: int | str | None = None) -> Dataset:
    """Return the data set: moments of 80 movements for training, 20 each for validation and test.

    Inputs and targets are standardised by the statistics of the training set.

    Parameters
    ----------
    seed : int
    target : int or "all", optional
        The joint, 0 (the default) to 6, whose torque is the target, or all seven.

    Raises
    ------
    UserError
        If there is no such joint.
    """
    joints = columns_of("arm", target, range(JOINTS))

    def part(split: str) -> tuple[Array, Array]:
        rng = stream(seed, "arm", split)
        motion = movements(rng, MOVEMENTS[split])
        # Shuffled, so that the first examples already come from many movements.
        rows = rng.permutation(len(motion[0]))
        return np.concatenate(motion, axis=1)[rows], torques(*motion)[rows][:, joints]

    return standardised("arm", part("train"), part("val"), part("test"))


def movements(rng: np.random.Generator, count: int) -> tuple[Array, Array, Array]:
    """Return angles, velocities and accelerations of random smooth movements within the limits.

    Each joint follows a sum of sines of random frequency, phase and share of the joint's range.

    Returns
    -------
    q, qd, qdd : float64 arrays (count * MOMENTS, 7), in rad, rad/s and rad/s^2
    """
    low, high = np.array([(link.low, link.high) for link in ARM]).T
    omega = 2 * np.pi * rng.uniform(*FREQUENCIES, (SINES, count, 1, JOINTS))  # rad/s
    phase = rng.uniform(0, 2 * np.pi, omega.shape)
    share = rng.dirichlet(np.ones(SINES), (count, 1, JOINTS)).transpose(3, 0, 1, 2)
    size = share * (high - low) / 2
    t = INTERVAL * np.arange(MOMENTS)[:, None]
    q = (low + high) / 2 + (size * np.sin(omega * t + phase)).sum(axis=0)
    qd = (size * omega * np.cos(omega * t + phase)).sum(axis=0)
    qdd = -(size * omega**2 * np.sin(omega * t + phase)).sum(axis=0)
    return q.reshape(-1, JOINTS), qd.reshape(-1, JOINTS), qdd.reshape(-1, JOINTS)


def torques(q: Array, qd: Array, qdd: Array) -> Array:
    """Return the joint torques of a motion, by the recursive Newton-Euler algorithm.

    Parameters
    ----------
    q, qd, qdd : float arrays (n, 7), in rad, rad/s and rad/s^2

    Returns
    -------
    tau : float array (n, 7), N m
    """
    n = len(q)
    z = np.array([0.0, 0.0, 1.0])
    # Outwards from the base: angular velocity w, angular acceleration wd and acceleration of the
    # frame's origin vd, of each link in its own frame; then force F and moment N on its body.
    w, wd = np.zeros((n, 3)), np.zeros((n, 3))
    vd = np.broadcast_to(-GRAVITY, (n, 3))  # an accelerated base stands for gravity
    rotations, loads = [], []
    for i, link in enumerate(ARM):
        mass, centre, inertia = link.body()
        R = link.rotation(q[:, i])
        vd = _into(R, vd + _swing(w, wd, link.offset()))
        w_before = _into(R, w)
        w = w_before + qd[:, i, None] * z
        wd = _into(R, wd) + np.cross(w_before, qd[:, i, None] * z) + qdd[:, i, None] * z
        F = mass * (vd + _swing(w, wd, centre))
        N = wd @ inertia + np.cross(w, w @ inertia)
        rotations.append(R)
        loads.append((F, N + np.cross(centre, F)))
    # Inwards from the hand: force f and moment m that each link gets from the one before.
    tau = np.empty((n, JOINTS))
    f, m = np.zeros((n, 3)), np.zeros((n, 3))
    for i in reversed(range(JOINTS)):
        F, N = loads[i]
        f, m = f + F, m + N
        tau[:, i] = m[:, 2]
        f = _out_of(rotations[i], f)
        m = _out_of(rotations[i], m) + np.cross(ARM[i].offset(), f)
    return tau


def _swing(w: Array, wd: Array, r: Array) -> Array:
    """Return the acceleration of the point r of a turning body against the body's origin."""
    return np.cross(wd, r) + np.cross(w, np.cross(w, r))


def _into(R: Array, v: Array) -> Array:
    """Return vectors of the frame before in the link's own frame: R^T v, (n, 3)."""
    return np.einsum("nji,nj->ni", R, v)


def _out_of(R: Array, v: Array) -> Array:
    """Return vectors of the link's frame in the frame before: R v, (n, 3)."""
    return np.einsum("nij,nj->ni", R, v)
