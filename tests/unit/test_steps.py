"""Long work of a nest: one piece in a round of its event loop."""

import asyncio

from flock_ray.runtime.steps import Steps


def test_between_two_steps_the_loop_looks_at_all_else_and_whom_a_step_wakes_is_first():
    async def go():
        loop, seen = asyncio.get_running_loop(), []
        steps = Steps(loop)

        async def worker(name):
            await steps.turn()
            seen.append(name)

        async def others():
            while len([one for one in seen if one != "round"]) < 5:
                seen.append("round")
                await asyncio.sleep(0)

        workers = [asyncio.ensure_future(worker("a"))]
        await asyncio.sleep(0)
        for name in "bc":
            steps.add(lambda name=name: seen.append(name))
        workers.append(asyncio.ensure_future(worker("d")))
        await asyncio.sleep(0)
        steps.add(lambda: seen.append("e"))
        await asyncio.gather(others(), *workers)
        assert [one for one in seen if one != "round"] == ["a", "b", "c", "d", "e"], "first come, first served"
        assert all("round" in (one, after) for one, after in zip(seen, seen[1:], strict=False)), "one in a round"

    asyncio.run(go())


def test_a_step_that_raises_keeps_no_other_back():
    async def go():
        seen, errors = [], []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
        steps = Steps(loop)
        steps.add(lambda: 1 / 0)
        steps.add(lambda: seen.append(1))
        await steps.turn()
        assert seen == [1] and [type(error) for error in errors] == [ZeroDivisionError]
        steps.add(lambda: seen.append(2))
        await asyncio.sleep(0.01)
        assert seen == [1, 2]

    asyncio.run(go())
