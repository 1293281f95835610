// Text between Java and C++. Java's strings are UTF-16, and the "modified UTF-8" of JNI's own functions is not UTF-8:
// it damages emoji.
#pragma once

#include <jni.h>

#include <string>

namespace transom {

// A Java string in UTF-8. A lone surrogate becomes U+FFFD; null becomes "".
std::string from_java(JNIEnv* env, jstring text);

// A Java string from UTF-8. Invalid bytes become U+FFFD, because names of files may hold any bytes. Null, with a
// pending exception, if there is no memory.
jstring to_java(JNIEnv* env, const std::string& bytes);

}  // namespace transom
