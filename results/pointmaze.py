"""A recorded data set that anyone can make in ten seconds, and on which learning with Q has something to win.

    python results/pointmaze.py    # the README has the command that learns from it

In Gymnasium-Robotics' U maze (MuJoCo) a ball, pushed by two forces, is paid 1 for each of 300 steps that ends within
0.45 of a goal at the end of one arm. The data are a wanderer's, who goes to one random cell after another and does not
know the goal. Score 0 is no reward, 100 the mean return of a walker who knows the goal, measured here.
"""

import sys
import warnings

import gymnasium as gym
import minari
import numpy as np
import pages  # noqa: F401 (so that erdp.py is found)
from minari.data_collector.episode_buffer import EpisodeBuffer

import erdp

DATASET = "pointmaze/wanderer-v0"
EPISODES = 300  # of the wanderer, 300 steps each
GOAL, START, WALL = "g", "r", 1
MAZE = [
    [WALL, WALL, WALL, WALL, WALL],
    [WALL, START, START, START, WALL],
    [WALL, WALL, WALL, START, WALL],
    [WALL, GOAL, START, START, WALL],
    [WALL, WALL, WALL, WALL, WALL],
]
WAY = [(3, 1), (3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)]  # its cells, from the goal on


def make_env() -> gym.Env:
    erdp.register_robots()
    options = dict(continuing_task=True, reset_target=False)
    return gym.make("PointMaze_UMaze-v3", maze_map=MAZE, max_episode_steps=300, **options)


def push(maze, observation, target: int, noise) -> np.ndarray:
    """The forces (2,) of a walker to the cell WAY[target], from cell to cell, as a damped spring with noise (2,)."""
    position, velocity = np.split(observation["observation"], 2)
    here = WAY.index(tuple(maze.cell_xy_to_rowcol(position)))
    towards = here + np.sign(target - here)
    aim = maze.cell_rowcol_to_xy(np.array(WAY[towards]))
    force = 10 * (aim - position) - velocity + noise
    return force.clip(-1, 1).astype(np.float32)


def episode(env, rng, knows_goal: bool) -> EpisodeBuffer:
    """One episode: of who knows the goal, without noise; else of a wanderer, who turns where a target is reached."""
    maze = env.unwrapped.maze
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    observations, actions, rewards = [observation], [], []
    target, over = 0 if knows_goal else rng.integers(len(WAY)), False
    while not over:
        distance = maze.cell_rowcol_to_xy(np.array(WAY[target])) - observation["achieved_goal"]
        if not knows_goal and np.linalg.norm(distance) < 0.4:
            target = rng.integers(len(WAY))
        noise = 0.3 * rng.standard_normal(2) * (not knows_goal)
        action = push(maze, observation, target, noise)
        observation, reward, _, over, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
    ends = np.arange(1, len(rewards) + 1) == len(rewards)
    return EpisodeBuffer(
        observations={key: np.stack([each[key] for each in observations]) for key in observation},
        actions=np.stack(actions),
        rewards=rewards,
        terminations=np.zeros_like(ends),
        truncations=ends,
    )


def main():
    env, rng = make_env(), np.random.default_rng(0)
    best = np.mean([sum(episode(env, rng, knows_goal=True).rewards) for _ in range(100)])
    data = [episode(env, rng, knows_goal=False) for _ in range(EPISODES)]
    own = np.mean([sum(each.rewards) for each in data])
    try:
        with warnings.catch_warnings(action="ignore"):  # at what the set does not say of its author
            minari.create_dataset_from_buffers(DATASET, data, env=env, ref_min_score=0.0, ref_max_score=float(best))
    except ValueError:
        sys.exit(f"pointmaze.py: {DATASET} is there already: `minari delete {DATASET}` removes it")
    print(f"{DATASET}: {EPISODES} episodes, mean return {own:.1f}; of who knows the goal {best:.1f}")


if __name__ == "__main__":
    main()
