"""The values of label maps that are no class. C is the count of classes, which are numbered 0..C-1.

On disk a scribble has 255 where nobody annotated. In training that becomes C, "not annotated", and 255 is ignored by
every loss: it is padding outside the image. In evaluation 255 marks the pixels that the data set leaves out.
"""

UNANNOTATED = 255  # on disk: not annotated (METHOD.md section 8)
IGNORED = 255  # inside training and evaluation: padding, or not evaluated
MOST_CLASSES = 254  # beside C and 255 in 8 bits
