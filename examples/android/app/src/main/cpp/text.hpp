// Text between Java and C++. Java's strings are UTF-16, and the "modified UTF-8" of JNI's own functions is not UTF-8:
// an emoji does not survive it.
#pragma once

#include <jni.h>

#include <string>

namespace transom {

// A Java string in UTF-8. A lone surrogate becomes U+FFFD; null becomes "".
std::string from_java(JNIEnv* env, jstring text);

// A Java string of UTF-8. What is none becomes U+FFFD: names of files may hold any bytes. Null, and an exception on its
// way, where there is no memory.
jstring to_java(JNIEnv* env, const std::string& bytes);

}  // namespace transom
