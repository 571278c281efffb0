// Failures of the machinery (never of a problem, which has a status): thrown with the text of the failing expression.
#pragma once

#include <stdexcept>
#include <string>

#define SST_CHECK(condition, message)                                                                          \
    do {                                                                                                       \
        if (!(condition)) {                                                                                    \
            throw std::runtime_error(std::string(message) + " [" #condition "] at " __FILE__ ":" +             \
                                     std::to_string(__LINE__));                                                \
        }                                                                                                      \
    } while (false)
