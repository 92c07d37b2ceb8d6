/* peaks.h - the most that this thread can do with operands in registers, in operations a second; 0: this processor, or this
 * build, has no such unit. sink: where something goes that depends on the work. */
#ifndef PEAKS_H
#define PEAKS_H

double bf16_peak(double seconds, float *sink, const char **unit); /* *unit: the instruction's name */
double int8_peak(double seconds);

#endif
