'''The teaching machinery: two notebooks from one source, checks, grades, progress.

How to write a chapter
----------------------
1. **Source**: ``notebooks/source/NN_name.py``, jupytext's percent format. The first cell is Markdown
   (``# Title``, the goal). The badge and the set-up cell are generated: do not write them. No magics.

2. **An exercise** is Markdown, then two code cells (the check is the very next code cell)::

       # %% [markdown]
       # ## Exercise 2.3: dequantize
       #
       # Write `dequantize(codes, scale)`: what, shapes. 1 line, 3 minutes, difficulty 1 of 3.
       #
       # <details><summary>Hint 1</summary>…</details>
       # <details><summary>Hint 2</summary>…</details>

       # %%
       # EXERCISE dequantize
       def dequantize(codes, scale):
           """Floats from integer codes."""
           ### BEGIN SOLUTION
           return codes.float() * scale
           ### END SOLUTION

       # %%
       # CHECK dequantize
       from labutils.course.checks import ch02

       ch02.dequantize(dequantize)

   The number is chapter.order. Only the part between the markers is blanked; an answer may also be
   a plain value (``weight_bytes = …``). Later cells use ``labutils``' own version, never the learner's.

3. **Its check**, in ``labutils/course/checks/ch02.py``, is a list of mistakes. The function's name is the
   exercise's name; it prints ``✓ 2.3 dequantize`` by itself when it returns::

       @exercise("2.3")
       def dequantize(answer):
           """Codes back to floats."""
           expect_function(
               answer,
               quantization.dequantize,
               cases=[{"codes": torch.tensor([-3, 5]), "scale": 0.5}],
               mistakes=[
                   (lambda codes, scale: codes / scale, "you divided by the scale: multiply"),
                   …
               ],
           )

   Each mistake is (wrong function or value, hint): its hint is shown when the learner's outcome
   (value or exception) equals the mistake's. Also ``expect_close``, ``expect_equal`` (values, with
   ``mistakes=[(wrong value, hint)]`` and ``given="…"``), ``expect_shape``, ``expect_type``,
   ``expect_true``, ``expect_raises``. Changed inputs, a forgotten ``return``, swapped axes, wrong
   units and exceptions are recognised without a word. Inputs are copied for every call.

4. **Wrong answers**: ``tests/wrong_answers/02_name.py``, at least three per exercise::

       # ruff: noqa: F811
       # %% WRONG dequantize | you divided by the scale
       # EXERCISE dequantize
       def dequantize(codes, scale):
           return codes / scale

   The words after ``|`` must stand in the *hint*; two wrong answers of an exercise need different
   hints (unless the header ends in ``| same``). ``python tests/lanes.py 02_name`` runs all three lanes, with what
   only makes a lesson's numbers steadier at the smaller sizes of ``tests/smaller.py``.

5. ``python -m labutils build`` writes both notebooks and executes solutions whose code has changed
   (``--only 02`` for one chapter). End the chapter with ``progress()`` of `labutils.course.progress`.

A complete small chapter: ``tests/fixtures/demo``.
'''
