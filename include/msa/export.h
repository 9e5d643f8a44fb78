/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MSA_EXPORT_H
#define MSA_EXPORT_H

/* Marks what the shared library exports; everything else is hidden. */
#if defined(__GNUC__)
#define MSA_API __attribute__((visibility("default")))
#else
#define MSA_API
#endif

#endif
